"""The targets of a copy: new files, existing files, images and pipes."""
