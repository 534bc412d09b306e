"""Files on object stores and web servers, read by ranges and kept in a cache."""
