"""What stored teacher scores are like: statistics of lists, of teachers, and of two teachers together."""
