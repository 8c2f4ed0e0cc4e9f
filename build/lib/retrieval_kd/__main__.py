"""`python -m retrieval_kd` is `rkd`."""

from retrieval_kd.cli import main

main()
