"""The names of common types of partitions, in the words of fdisk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qedfuse.partitions.partition import Scheme

_DOS: Final[Mapping[str, str]] = {
    "1": "FAT12",
    "4": "FAT16 <32M",
    "5": "Extended",
    "6": "FAT16",
    "7": "HPFS/NTFS/exFAT",
    "b": "W95 FAT32",
    "c": "W95 FAT32 (LBA)",
    "e": "W95 FAT16 (LBA)",
    "f": "W95 Ext'd (LBA)",
    "27": "Hidden NTFS WinRE",
    "82": "Linux swap / Solaris",
    "83": "Linux",
    "85": "Linux extended",
    "8e": "Linux LVM",
    "a5": "FreeBSD",
    "a6": "OpenBSD",
    "a9": "NetBSD",
    "ea": "Linux extended boot",
    "ef": "EFI (FAT-12/16/32)",
    "fd": "Linux raid autodetect",
}
_GPT: Final[Mapping[str, str]] = {
    "C12A7328-F81F-11D2-BA4B-00A0C93EC93B": "EFI System",
    "21686148-6449-6E6F-744E-656564454649": "BIOS boot",
    "E3C9E316-0B5C-4DB8-817D-F92DF00215AE": "Microsoft reserved",
    "EBD0A0A2-B9E5-4433-87C0-68B6B72699C7": "Microsoft basic data",
    "DE94BBA4-06D1-4D40-A16A-BFD50179D6AC": "Windows recovery environment",
    "0FC63DAF-8483-4772-8E79-3D69D8477DE4": "Linux filesystem",
    "0657FD6D-A4AB-43C4-84E5-0933C84B4F4F": "Linux swap",
    "933AC7E1-2EB4-4F13-B844-0E14E2AEF915": "Linux home",
    "3B8F8425-20E0-4F3B-907F-1A25A76F98E8": "Linux server data",
    "BC13C2FF-59E6-4262-A352-B275FD6F7172": "Linux extended boot",
    "44479540-F297-41B2-9AF7-D131D5F0458A": "Linux root (x86)",
    "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709": "Linux root (x86-64)",
    "B921B045-1DF0-41C3-AF44-4C6F280D3FAE": "Linux root (ARM-64)",
    "A19D880F-05FC-4D3B-A006-743F0F84911E": "Linux RAID",
    "E6D6D379-F507-44C2-A23C-238F2A3DF928": "Linux LVM",
    "516E7CB4-6ECF-11D6-8FF8-00022D09712B": "FreeBSD data",
    "516E7CB6-6ECF-11D6-8FF8-00022D09712B": "FreeBSD UFS",
    "516E7CBA-6ECF-11D6-8FF8-00022D09712B": "FreeBSD ZFS",
    "48465300-0000-11AA-AA11-00306543ECAC": "Apple HFS/HFS+",
    "7C3457EF-0000-11AA-AA11-00306543ECAC": "Apple APFS",
}


def type_name(scheme: Scheme, code: str) -> str:
    """Return the name of the type ``code`` (`Partition.type`); ``unknown`` if it is not listed."""
    return (_DOS if scheme == "dos" else _GPT).get(code, "unknown")
