"""The targets of the fuzzer for inputs: each passes bytes to one parser and judges what it does."""
