"""Every error lbq raises on purpose, and the exit code each one ends a command with.

    LbqError
    ├── UsageError   2    a request that makes no sense, or that ``--strict`` refuses
    ├── DataError    3    a file whose content is wrong
    ├── StorageError 4    the disk, a path or a permission
    ├── BusyError    5    somebody else is writing there
    ├── RemoteError  6    the Hub
    └── DeviceError  7    the GPU, or a kernel

A message is one line that names the file, the tensor and what to do.
"""

from __future__ import annotations


class LbqError(Exception):
    """Base of all errors that are the input's fault and not a bug of lbq's."""

    exit_code = 1


class UsageError(LbqError):
    exit_code = 2


class DataError(LbqError):
    exit_code = 3


class StorageError(LbqError):
    exit_code = 4


class BusyError(LbqError):
    exit_code = 5


class RemoteError(LbqError):
    exit_code = 6


class DeviceError(LbqError):
    exit_code = 7
