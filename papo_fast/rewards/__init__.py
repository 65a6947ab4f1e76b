"""What a response is worth: scores, and their shaping within a group."""
