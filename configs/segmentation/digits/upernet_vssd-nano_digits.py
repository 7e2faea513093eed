"""UPerNet with vssd_nano on the embedded scenes of digits."""

_base_ = "upernet_vmamba-nano_digits.py"
model = dict(backbone=dict(name="vssd_nano"))
