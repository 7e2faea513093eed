"""A package of its own: mmsegmentation installs another one of this name, which would be found instead."""
