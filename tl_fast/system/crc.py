"""CRC-32, equal to zlib's but by Intel's ISA-L where python-isal is installed: 10 GB/s on one core instead of 2.5."""

try:
    from isal.isal_zlib import crc32
except ImportError:  # no wheel exists for this machine
    from zlib import crc32

__all__ = ["crc32"]
