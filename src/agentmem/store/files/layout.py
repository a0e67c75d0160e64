"""Places of things in a store's directory. Names are made of keys and branch ids (hex) only."""

from dataclasses import dataclass
from pathlib import Path

SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Layout:
    """The paths in the directory of one store. No name has anything of an agent's.

    manifest.sqlite                 what the store holds; a file that it doesn't name is garbage
    lock                            flock'ed by the one process that has the store open; its pid
    blocks/ab/KEY.safetensors       KEY in hex, ab its first byte
    tails/BRANCH-N.safetensors      N grows, so a tail that is replaced is never overwritten
    quarantine/                     files that failed verification, a damaged manifest among them;
                                    64 MB at most
    exports/ID/                     second names of files that are being exported
    """

    root: Path

    @property
    def manifest(self) -> Path:
        return self.root / "manifest.sqlite"

    @property
    def lock(self) -> Path:
        return self.root / "lock"

    @property
    def blocks(self) -> Path:
        return self.root / "blocks"

    @property
    def tails(self) -> Path:
        return self.root / "tails"

    @property
    def quarantine(self) -> Path:
        return self.root / "quarantine"

    @property
    def exports(self) -> Path:
        return self.root / "exports"

    def block(self, key: bytes) -> Path:
        name = key.hex()
        return self.blocks / name[:2] / (name + SUFFIX)

    def tail(self, branch_id: str, generation: int) -> Path:
        return self.tails / f"{branch_id}-{generation}{SUFFIX}"
