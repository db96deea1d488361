"""Who fails under attack, and whether to believe the numbers."""
