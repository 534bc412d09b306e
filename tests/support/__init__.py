"""What the tests share: models, stand-ins and the real peers."""
