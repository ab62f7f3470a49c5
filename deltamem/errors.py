"""The errors a user of the library can meet."""


class DeltaMemError(ValueError):
    """Base of every error of the library that a user can mend; says what was wrong, where, and what to do."""


class ConfigError(DeltaMemError):
    """A configuration value that has no meaning."""


class UnsupportedModelError(DeltaMemError):
    """A backbone whose attention layers the adapter can't find its way around."""


class AdapterFormatError(DeltaMemError):
    """An adapter folder that is malformed or doesn't fit the backbone."""


class MemoryMismatchError(DeltaMemError):
    """A memory that doesn't belong to the adapter or the batch it is used with."""


class SegmentsMissingError(DeltaMemError):
    """SSW was asked to write without being told where messages begin and end."""


class WindowError(DeltaMemError):
    """Messages that don't fit the context window of a chat."""


class SnapshotError(DeltaMemError):
    """A saved chat that is damaged, or belongs to another adapter or backbone."""


class ChatExistsError(DeltaMemError):
    """A folder in which a chat is to be saved holds another one."""
