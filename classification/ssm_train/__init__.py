"""ImageNet-style training and evaluation of the models registered by `ssm_models`."""
