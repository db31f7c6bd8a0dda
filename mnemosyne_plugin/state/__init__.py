"""What a rank owns, and how it moves to a newcomer."""
