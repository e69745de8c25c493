/* SPDX-License-Identifier: GPL-2.0 */
/* The parameters of a device: those of the module when the device is created. */
#ifndef VFIO_V3_SAMPLE_PARAMS_H
#define VFIO_V3_SAMPLE_PARAMS_H

#include <linux/types.h>

struct seq_file;

enum { SAMPLE_LOCK_FD, SAMPLE_LOCK_DEVICE, SAMPLE_LOCK_GLOBAL };
enum { SAMPLE_OVER_COMMAND, SAMPLE_OVER_COPY };
enum { SAMPLE_INITIAL_IMAGE, SAMPLE_INITIAL_CRITICAL };
enum { SAMPLE_REINIT_FLUSH, SAMPLE_REINIT_PRIORITY };
enum { SAMPLE_EPOCHS_KEEP, SAMPLE_EPOCHS_INVALIDATE };

#define SAMPLE_MAX_US	60000000
#define SAMPLE_FIRMWARES	16

#define SAMPLE_FAULT_BYTES	32

struct sample_params {
#define SAMPLE_PARAM(name, ...) u32 name
#include "param_list.h"
	char fault[SAMPLE_FAULT_BYTES];	/* "call:number" */
};

int sample_params_init(struct sample_params *params);
void sample_params_show(struct seq_file *file, const struct sample_params *params);
int sample_params_change(struct sample_params *params, char *text);

#endif
