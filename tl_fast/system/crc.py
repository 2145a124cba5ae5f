"""CRC-32, the same as zlib's, by Intel's ISA-L where python-isal is installed: 10 GB/s on one core instead of 2.5."""

try:
    from isal.isal_zlib import crc32
except ImportError:  # a machine that no wheel exists for
    from zlib import crc32

__all__ = ["crc32"]
