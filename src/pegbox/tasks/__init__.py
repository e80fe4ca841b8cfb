"""Tasks: what differs by modality. Importing this package registers the built-in ones."""

from pegbox.tasks.classification import ClassificationTask
from pegbox.tasks.text import TextTask

__all__ = ["ClassificationTask", "TextTask"]
