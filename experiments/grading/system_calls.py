"""The system calls that a sandboxed program is refused, as a filter that the kernel runs.

Namespaces and limits leave two ways open, which this closes. A program without privileges may make
a user namespace of its own and be root in it, with file systems of any size; and some memory (of
``memfd_create`` and of System V) belongs to no process, so that no limit on processes counts it.
"""

import platform
import struct

# Numbers as in the kernel's tables for x86-64 and for the machines that share the generic table.
_REFUSED = {
    "x86_64": {
        **{"ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311},
        **{"unshare": 272, "setns": 308, "mount": 165, "umount2": 166, "pivot_root": 155},
        **{"chroot": 161, "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsconfig": 431},
        **{"fsmount": 432, "fspick": 433, "mount_setattr": 442, "open_by_handle_at": 304},
        **{"add_key": 248, "request_key": 249, "keyctl": 250, "bpf": 321, "perf_event_open": 298},
        **{"userfaultfd": 323, "io_uring_setup": 425, "memfd_create": 319, "memfd_secret": 447},
        **{"shmget": 29, "msgget": 68},
    },
    "aarch64": {
        **{"ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271},
        **{"unshare": 97, "setns": 268, "mount": 40, "umount2": 39, "pivot_root": 41},
        **{"chroot": 51, "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsconfig": 431},
        **{"fsmount": 432, "fspick": 433, "mount_setattr": 442, "open_by_handle_at": 265},
        **{"add_key": 217, "request_key": 218, "keyctl": 219, "bpf": 280, "perf_event_open": 241},
        **{"userfaultfd": 282, "io_uring_setup": 425, "memfd_create": 279, "memfd_secret": 447},
        **{"shmget": 194, "msgget": 186},
    },
}
_CLONE = {"x86_64": 56, "aarch64": 220}
_CLONE3 = 435
_NEW_NAMESPACES = 0x7E020000  # every CLONE_NEW* flag
_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH_*
_OTHER_TABLE = 0x40000000  # x86-64: from here on, the numbers of x32

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # BPF, words
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_NOT_PERMITTED, _NOT_IMPLEMENTED = 0x00050000 | 1, 0x00050000 | 38  # with errno


def build_filter() -> bytes | None:
    """The filter for this machine, as ``bwrap --seccomp`` takes it; None where none is known."""
    machine = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    if machine not in _REFUSED:
        return None
    number, architecture, first_argument = 0, 4, 16  # offsets in struct seccomp_data, little-endian
    program = [
        (_LOAD, 0, 0, architecture),
        (_EQUAL, 1, 0, _ARCHITECTURE[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, number),
        (_AT_LEAST, 0, 1, _OTHER_TABLE),
        (_RETURN, 0, 0, _NOT_PERMITTED),
        # The flags of clone3 lie in memory, out of the filter's sight; the C library does without.
        (_EQUAL, 0, 1, _CLONE3),
        (_RETURN, 0, 0, _NOT_IMPLEMENTED),
    ]
    for refused in _REFUSED[machine].values():
        program += [(_EQUAL, 0, 1, refused), (_RETURN, 0, 0, _NOT_PERMITTED)]
    program += [
        (_EQUAL, 0, 3, _CLONE[machine]),
        (_LOAD, 0, 0, first_argument),
        (_ANY_BIT, 0, 1, _NEW_NAMESPACES),
        (_RETURN, 0, 0, _NOT_PERMITTED),
        (_RETURN, 0, 0, _ALLOW),
    ]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
