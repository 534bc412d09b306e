"""The bytes of a QED image turned into values and back; no I/O happens here."""
