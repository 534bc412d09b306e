"""What can be done to an image as a whole: functions that return data and print nothing."""
