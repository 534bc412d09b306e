"""Random images and requests against simple models."""
