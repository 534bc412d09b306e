"""Tests of exports of NBD servers."""
