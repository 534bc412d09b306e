"""One opened image: lookup, requests, allocation and the ordered write-back."""
