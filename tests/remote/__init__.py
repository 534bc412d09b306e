"""Tests of files on object stores and web servers, and of the cache for them."""
