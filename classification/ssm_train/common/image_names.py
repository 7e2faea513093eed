"""Which files and folders hold images, by their names."""

from torchvision.datasets.folder import IMG_EXTENSIONS

# torchvision's, and what cameras, phones and browsers write beside
SUFFIXES = (*IMG_EXTENSIONS, ".gif", ".jpe", ".jfif", ".pbm", ".pnm", ".avif", ".heic", ".heif", ".hif")

# what systems put among a user's own; names that begin with a dot are hidden anyway
_OF_SYSTEMS = {"__macosx", "@eadir", "lost+found", "system volume information", "$recycle.bin"}
_OF_SYSTEMS |= {"thumbs.db", "ehthumbs.db", "desktop.ini"}


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is none of the user's: `.ipynb_checkpoints`, `.git`, `__MACOSX`, `@eaDir`,
    and `._photo.jpg`, which macOS writes beside photo.jpg."""
    return name.startswith(".") or name.lower() in _OF_SYSTEMS


def is_image(name: str) -> bool:
    """Whether a file of this name is an image that may be read."""
    return name.lower().endswith(SUFFIXES) and not is_hidden(name)
