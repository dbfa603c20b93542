"""Memory that two processes share: an anonymous file (memfd), which needs no room in /dev/shm and vanishes with its
last holder. It travels as a descriptor over a socket."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import socket

Shared = mmap.mmap
_M_MMAP_THRESHOLD = -3


def create(name: str, size: int) -> int:
    """A descriptor of so many bytes of memory."""
    descriptor = os.memfd_create(name)
    os.ftruncate(descriptor, size)
    return descriptor


def view(descriptor: int) -> Shared:
    """The memory behind a descriptor that stays open."""
    return mmap.mmap(descriptor, os.fstat(descriptor).st_size)


def hand_over(sock: socket.socket, descriptor: int) -> None:
    """Sends the memory to the process at the other end."""
    socket.send_fds(sock, [b"f"], [descriptor])


def take_over(sock: socket.socket) -> Shared:
    """The memory that `hand_over` sent."""
    _, (descriptor,), _, _ = socket.recv_fds(sock, 1, 1)
    memory = view(descriptor)
    os.close(descriptor)
    return memory


def keep_large_blocks_apart(size: int = 1 << 20) -> None:
    """Has glibc give each block of `size` bytes or more pages of its own. Else it puts those of up to 32 MB among the
    small ones once it has seen some, and a buffer that grows is copied (20 ms), where its pages could be moved."""
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, size)
