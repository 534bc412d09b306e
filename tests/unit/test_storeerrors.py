"""Messages about errors of the object store library."""

from __future__ import annotations

import pytest

from qedfuse.remote.storeerrors import translated


@pytest.mark.parametrize(
    "url",
    ["https://host/key?sig=SECRET", "https://host/key#SECRET", "https://user:SECRET@host/key"],
)
@pytest.mark.parametrize("before", ["", "Config error: ", "Generic error - "])
def test_a_message_has_no_secret_of_a_url(before: str, url: str) -> None:
    """What stays of the library's text is shown without the user, query and fragment of a URL."""
    message = str(translated(ValueError(f"{before}cannot use {url} here")))
    assert "SECRET" not in message
    assert "cannot use https://" in message
    assert message.endswith(" here")
