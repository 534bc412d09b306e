"""Small tools that know nothing of QED."""
