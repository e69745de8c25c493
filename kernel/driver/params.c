// SPDX-License-Identifier: GPL-2.0
/* The module's parameters, and a device's copy of them. */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/bits.h>
#include <linux/module.h>
#include <linux/seq_file.h>
#include <linux/string.h>

#include "params.h"

static const char * const sample_lock_names[] = { "fd", "device", "global", NULL };
static const char * const sample_lock_over_names[] = { "command", "copy", NULL };
static const char * const sample_epochs_names[] = { "keep", "invalidate", NULL };
static const char * const sample_initial_names[] = { "image", "critical", NULL };

struct sample_param {
	const char *name;
	size_t offset;
	u32 least;
	u32 most;
	const char * const *values;
	bool live;
};

enum {
#define X(name, ...) SAMPLE_PARAM_##name,
	SAMPLE_PARAMS(X)
#undef X
};

static const struct sample_param sample_param_table[] = {
#define X(name, value, least, most, values, live, text)			\
	{ #name, offsetof(struct sample_params, name), least, most, values, live },
	SAMPLE_PARAMS(X)
#undef X
};

struct sample_params sample_defaults = {
#define X(name, value, ...) .name = value,
	SAMPLE_PARAMS(X)
#undef X
};

static u32 *sample_param_in(struct sample_params *params, const struct sample_param *param)
{
	return (void *)params + param->offset;
}

static u32 sample_param_value(const struct sample_params *params, const struct sample_param *param)
{
	return *(const u32 *)((const void *)params + param->offset);
}

static int sample_param_parse(const struct sample_param *param, const char *text, u32 *value)
{
	int ret;

	if (param->values) {
		ret = __sysfs_match_string(param->values, param->most + 1, text);
		if (ret < 0)
			return ret;
		*value = ret;
		return 0;
	}
	ret = kstrtou32(text, 0, value);
	if (!ret && (*value < param->least || *value > param->most))
		ret = -ERANGE;
	return ret;
}

static int sample_param_set(const char *text, const struct kernel_param *kp)
{
	const struct sample_param *param = kp->arg;
	u32 value;
	int ret = sample_param_parse(param, text, &value);

	if (!ret)
		WRITE_ONCE(*sample_param_in(&sample_defaults, param), value);
	return ret;
}

static int sample_param_get(char *buf, const struct kernel_param *kp)
{
	const struct sample_param *param = kp->arg;
	u32 value = sample_param_value(&sample_defaults, param);

	if (param->values)
		return sysfs_emit(buf, "%s\n", param->values[value]);
	return sysfs_emit(buf, "%u\n", value);
}

static const struct kernel_param_ops sample_param_ops = {
	.set = sample_param_set,
	.get = sample_param_get,
};

#define X(name, value, least, most, values, live, text)					\
	module_param_cb(name, &sample_param_ops,					\
			(void *)&sample_param_table[SAMPLE_PARAM_##name], 0644);	\
	MODULE_PARM_DESC(name, text);
SAMPLE_PARAMS(X)
#undef X

module_param_string(fault, sample_defaults.fault, SAMPLE_FAULT_BYTES, 0644);
MODULE_PARM_DESC(fault, "\"call:number\": that call of a device fails, e.g. save:3");

int sample_params_check(const struct sample_params *params)
{
	if (params->size_kib % params->block_kib || params->size_kib < params->block_kib) {
		pr_err("size_kib=%u is not a multiple of block_kib=%u\n", params->size_kib,
		       params->block_kib);
		return -EINVAL;
	}
	return 0;
}

void sample_params_show(struct seq_file *file, const struct sample_params *params)
{
	size_t i;

	for (i = 0; i < ARRAY_SIZE(sample_param_table); i++) {
		const struct sample_param *param = &sample_param_table[i];
		u32 value = sample_param_value(params, param);

		if (param->values)
			seq_printf(file, "%s %s\n", param->name, param->values[value]);
		else
			seq_printf(file, "%s %u\n", param->name, value);
	}
	seq_printf(file, "fault %s\n", params->fault);
}

/* "name value" or "name=value". -EPERM: it cannot be changed any more. */
int sample_params_change(struct sample_params *params, char *text)
{
	char *value = strim(text);
	char *name = strsep(&value, " =");
	size_t i;
	u32 number;
	int ret;

	value = value ? strim(value) : "";
	if (!strcmp(name, "fault"))
		return strscpy(params->fault, value) < 0 ? -E2BIG : 0;
	for (i = 0; i < ARRAY_SIZE(sample_param_table); i++) {
		const struct sample_param *param = &sample_param_table[i];

		if (strcmp(name, param->name))
			continue;
		if (!param->live)
			return -EPERM;
		ret = sample_param_parse(param, value, &number);
		if (!ret)
			WRITE_ONCE(*sample_param_in(params, param), number);
		return ret;
	}
	return -ENOENT;
}
