"""The exceptions and warnings of fastpeft, one tree so that callers can catch what they mean."""


class FastpeftError(Exception):
    """Base of every error that fastpeft raises on purpose."""


class PeftError(FastpeftError, ValueError):
    """A model and an adapter config that do not fit each other."""


class NoMatchingPeftModuleError(PeftError):
    """No module of the model is named by the config's target options."""


class UnsupportedOptionError(FastpeftError, NotImplementedError):
    """A config option that PEFT has and fastpeft does not implement; never ignored, always this error."""


class AdapterFileError(FastpeftError, ValueError):
    """An adapter file that is missing, damaged, or does not fit the model; the model is left as it was."""


class BackendError(FastpeftError, RuntimeError):
    """A forced backend that cannot run here; the message says why and what to do."""


class PeftWarning(UserWarning):
    """Something that works but is probably not what was meant."""
