"""Image folders, augmentation, and samplers whose order does not depend on how many processes read."""
