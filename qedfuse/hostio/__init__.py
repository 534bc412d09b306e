"""The host's side: the file that holds an image, and who else has it open."""
