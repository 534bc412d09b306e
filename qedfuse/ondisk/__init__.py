"""The QED format: bytes of an image to values and back, without any I/O."""
