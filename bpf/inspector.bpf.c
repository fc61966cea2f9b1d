// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* What the kernel tells of all sandboxes: see docs/inspector.md. */
#include "functions.h"
#include "mappings.h"
#include "marks.h"
#include "registers.h"
#include "tasks.h"
#include "timestamps.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";
