"""Reading, making and checking word images."""
