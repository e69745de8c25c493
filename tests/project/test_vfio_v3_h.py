# SPDX-License-Identifier: GPL-2.0-or-later
"""docs/vfio_v3.h against proto_v3.vfio.uapi, and docs/vfio_v3_stream.h against sim.device.record_format: as a compiler
lays them out, with nothing missing on either side."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from proto_v3.vfio import uapi
from proto_v3.vfio.uapi import CType, Feature, StreamFlags, Structure, offset_of
from sim.device import record_format
from sim.device.record_format import RecordClass, RecordFlags

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "vfio_v3.h").read_text()
STREAM_TEXT = (DOCS / "vfio_v3_stream.h").read_text()
STRICT = ("-Wall", "-Wextra", "-Werror", "-pedantic", f"-I{DOCS}")

OF_VFIO_H = {
    uapi.DeviceFeature,
    uapi.FeatureMigration,
    uapi.FeatureMigState,
    uapi.FeatureMigDataSize,
    uapi.PrecopyInfo,
}
"""v2's: the kernel's own header has them."""
OF_UAPI: dict[str, type[Structure]] = {
    "vfio_device_feature_mig_streams": uapi.FeatureMigStreams,
    "vfio_mig_get_stream": uapi.GetStream,
    "vfio_mig_stream_info": uapi.StreamInfo,
    "vfio_mig_dirty_blocks": uapi.GetDirtyBlocks,
}
OF_STREAMS: dict[str, type[Structure]] = {
    "vfio_mig_record": record_format.RecordHeader,
    "vfio_mig_record_end": record_format.RecordEnd,
    "vfio_mig_record_ranges": record_format.RecordRanges,
    "vfio_mig_block_range": record_format.BlockRange,
    "vfio_mig_record_blocks": record_format.RecordBlocks,
}
STRUCTURES = OF_UAPI | OF_STREAMS
UAPI_NUMBERS = {
    "VFIO_MIG_MAX_DIRTY_STREAMS": uapi.MAX_DIRTY_STREAMS,
    "VFIO_MIG_BLOCKS_HEAD_BYTES": uapi.BLOCKS_HEAD_BYTES,
    "VFIO_MIG_BLOCKS_END_BYTES": uapi.BLOCKS_END_BYTES,
    "VFIO_DEVICE_FEATURE_MIG_STREAMS": int(Feature.MIG_STREAMS),
    "VFIO_MIG_GET_STREAM": uapi.VFIO_MIG_GET_STREAM,
    "VFIO_MIG_GET_STREAM_INFO": uapi.VFIO_MIG_GET_STREAM_INFO,
    "VFIO_MIG_GET_DIRTY_BLOCKS": uapi.VFIO_MIG_GET_DIRTY_BLOCKS,
    **{f"VFIO_MIG_STREAMS_{flag.name}": int(flag) for flag in StreamFlags},
}
STREAM_NUMBERS = {
    "VFIO_MIG_MAX_EPOCHS_AHEAD": record_format.MAX_EPOCHS_AHEAD,
    **{f"VFIO_MIG_RECORD_{kind.name}": int(kind) for kind in RecordClass},
    **{f"VFIO_MIG_RECORD_F_{flag.name}": int(flag) for flag in RecordFlags},
}
VFIO_HS_OWN = {"VFIO_TYPE": ord(";"), "VFIO_BASE": 100}
"""Defined only where vfio.h is not included."""
NUMBERS = UAPI_NUMBERS | STREAM_NUMBERS | VFIO_HS_OWN
C_TYPES = {"__u32": CType.U32, "__s32": CType.S32, "__aligned_u64": CType.U64}
LE_TYPES = {"__le16": CType.LE16, "__le32": CType.LE32, "__le64": CType.LE64}


# --- by its text, for which no compiler is needed ---------------------------------------------------------------------


def members_of(name: str, text: str, types: dict[str, CType]) -> list[tuple[str, CType]]:
    """What a header's text says of a structure: its members in order."""
    body = re.search(rf"^struct {name} {{\n(.*?)^}};$", text, re.MULTILINE | re.DOTALL)
    assert body is not None
    declarations = [line for line in body[1].splitlines() if not line.startswith("#define")]
    found = [re.fullmatch(r"\t(\w+)\t(\w+);", line) for line in declarations]
    assert all(found), declarations
    return [(match[2], types[match[1]]) for match in found if match]


def structures_in(module: ModuleType) -> set[type[Structure]]:
    return {s for s in vars(module).values() if isinstance(s, type) and issubclass(s, Structure)} - {Structure}


def test_every_structure_of_v3_is_in_its_header_and_none_else() -> None:
    assert structures_in(uapi) - OF_VFIO_H == set(OF_UAPI.values())
    assert structures_in(record_format) == set(OF_STREAMS.values())
    assert re.findall(r"^struct (\w+) {", TEXT, re.MULTILINE) == list(OF_UAPI)
    assert re.findall(r"^struct (\w+) {", STREAM_TEXT, re.MULTILINE) == list(OF_STREAMS)


def test_every_number_of_a_header_is_known_and_every_known_one_is_there() -> None:
    defined = re.compile(r"^#define (VFIO_\w+)", re.MULTILINE)
    assert sorted(defined.findall(TEXT)) == sorted(UAPI_NUMBERS | VFIO_HS_OWN)
    assert sorted(defined.findall(STREAM_TEXT)) == sorted(STREAM_NUMBERS)


@pytest.mark.parametrize("name", STRUCTURES)
def test_members_and_their_types_are_the_same(name: str) -> None:
    """The machine's byte order in what the kernel is asked; little-endian in what goes to another machine."""
    text, types = (TEXT, C_TYPES) if name in OF_UAPI else (STREAM_TEXT, LE_TYPES)
    assert members_of(name, text, types) == list(STRUCTURES[name].LAYOUT.items())


def test_a_user_of_blocks_need_not_know_the_records_to_know_their_sizes() -> None:
    assert uapi.BLOCKS_HEAD_BYTES == record_format.RecordHeader.SIZE + record_format.RecordBlocks.SIZE
    assert uapi.BLOCKS_END_BYTES == record_format.RecordHeader.SIZE + record_format.RecordEnd.SIZE


@pytest.mark.parametrize("name", STRUCTURES)
def test_pythons_structure_names_cs(name: str) -> None:
    doc = STRUCTURES[name].__doc__
    assert doc is not None
    assert f"`struct {name}`" in doc


def test_it_says_what_it_is() -> None:
    assert TEXT.startswith("/* SPDX-License-Identifier: GPL-2.0-or-later WITH Linux-syscall-note */\n")
    assert "EXPERIMENTAL. No kernel has any of this;" in TEXT
    assert STREAM_TEXT.startswith("/* SPDX-License-Identifier: GPL-2.0-or-later */\n")
    assert "This is not a uAPI." in STREAM_TEXT


# --- by a compiler ----------------------------------------------------------------------------------------------------


def compiled(compiler: str, source: Path, *arguments: str | Path) -> None:
    """Fails with what the compiler said."""
    done = subprocess.run([compiler, *STRICT, *arguments, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def is_usable(compiler: str) -> bool:
    """Whether it has the kernel's headers for user space."""
    asked = "#include <linux/types.h>\n#include <linux/ioctl.h>\n"
    return subprocess.run([compiler, "-E", "-x", "c", "-"], input=asked, text=True, capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def cc() -> str:
    """A C compiler, which `make test` installs where it may; where there is none the test is skipped, and says so."""
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name) and is_usable(name):
            return name
    reason = "no C compiler with the kernel's headers; on Debian: apt-get install gcc libc6-dev linux-libc-dev"
    pytest.skip(reason)


def program() -> str:
    """C that prints a line for each number and structure, and for each member its offset and size."""
    lines = [f'\tprintf("{name} %llu\\n", (unsigned long long)({name}));' for name in NUMBERS]
    for name, structure in STRUCTURES.items():
        lines.append(f'\tprintf("{name} %zu\\n", sizeof(struct {name}));')
        lines += [
            f'\tprintf("{name}.{member} %zu %zu\\n", offsetof(struct {name}, {member}), '
            f"sizeof(((struct {name} *)0)->{member}));"
            for member in structure.LAYOUT
        ]
    includes = '#include <stddef.h>\n#include <stdio.h>\n#include "vfio_v3.h"\n#include "vfio_v3_stream.h"\n'
    return includes + "int main(void)\n{\n" + "\n".join(lines) + "\n\treturn 0;\n}\n"


def expected() -> list[str]:
    """What program() prints if C and Python agree."""
    lines = [f"{name} {value}" for name, value in NUMBERS.items()]
    for name, structure in STRUCTURES.items():
        lines.append(f"{name} {structure.SIZE}")
        members = list(structure.LAYOUT)
        ends = [offset_of(structure, member) for member in members[1:]] + [structure.SIZE]
        for member, end in zip(members, ends, strict=True):
            at = offset_of(structure, member)
            lines.append(f"{name}.{member} {at} {end - at}")
    return lines


def test_c_lays_it_out_as_python_does(cc: str, tmp_path: Path) -> None:
    source = tmp_path / "layout.c"
    source.write_text(program())
    compiled(cc, source, "-std=c11", "-o", tmp_path / "layout")
    printed = subprocess.run([tmp_path / "layout"], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines() == expected()


INCLUDES = {
    "alone": ["vfio_v3.h"],
    "twice": ["vfio_v3.h", "vfio_v3.h"],
    "before vfio.h": ["vfio_v3.h", "linux/vfio.h"],
    "after vfio.h": ["linux/vfio.h", "vfio_v3.h"],
    "of streams, before": ["vfio_v3_stream.h", "vfio_v3.h"],
    "of streams, twice": ["vfio_v3.h", "vfio_v3_stream.h", "vfio_v3_stream.h"],
}


def including(headers: list[str]) -> str:
    return "".join(f"#include <{header}>\n" for header in headers) + "int main(void) { return VFIO_BASE != 100; }\n"


@pytest.mark.parametrize("headers", INCLUDES.values(), ids=INCLUDES.keys())
def test_it_compiles_as_c(cc: str, headers: list[str], tmp_path: Path) -> None:
    source = tmp_path / "includes.c"
    source.write_text(including(headers))
    compiled(cc, source, "-std=c11", "-fsyntax-only")


@pytest.mark.parametrize("headers", INCLUDES.values(), ids=INCLUDES.keys())
def test_it_compiles_as_cpp(cc: str, headers: list[str], tmp_path: Path) -> None:
    if not shutil.which("c++"):
        pytest.skip("no C++ compiler")
    source = tmp_path / "includes.cc"
    source.write_text(including(headers))
    compiled("c++", source, "-std=c++11", "-fsyntax-only")
