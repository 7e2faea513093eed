"""What detection and segmentation share: command lines, safe checkpoints, data checks, and scenes of digits."""
