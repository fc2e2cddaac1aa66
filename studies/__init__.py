"""Does it help: trainings of many seeds, and what they show."""
