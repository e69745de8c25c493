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
static const char * const sample_reinit_names[] = { "flush", "priority", NULL };
static const char * const sample_initial_names[] = { "image", "critical", NULL };

struct sample_param {
	const char *name;
	u32 value;			/* of devices that are created from now on */
	u32 least;
	u32 most;
	const char * const *values;	/* their names, if they have some */
	bool live;
};

static int sample_param_parse(const struct sample_param *param, const char *text, u32 *value)
{
	u32 number;
	int ret;

	if (param->values) {
		ret = __sysfs_match_string(param->values, param->most + 1, text);
		if (ret < 0)
			return ret;
		number = ret;
	} else {
		ret = kstrtou32(text, 0, &number);
		if (ret)
			return ret;
		if (number < param->least || number > param->most)
			return -ERANGE;
	}
	WRITE_ONCE(*value, number);
	return 0;
}

static int sample_param_set(const char *text, const struct kernel_param *kp)
{
	struct sample_param *param = kp->arg;

	return sample_param_parse(param, text, &param->value);
}

static int sample_param_get(char *buf, const struct kernel_param *kp)
{
	const struct sample_param *param = kp->arg;

	if (param->values)
		return sysfs_emit(buf, "%s\n", param->values[param->value]);
	return sysfs_emit(buf, "%u\n", param->value);
}

static const struct kernel_param_ops sample_param_ops = {
	.set = sample_param_set,
	.get = sample_param_get,
};

#define SAMPLE_PARAM(_name, _value, _least, _most, _values, _live, _text)		\
	static struct sample_param sample_param_##_name = {				\
		.name = #_name,								\
		.value = _value,							\
		.least = _least,							\
		.most = _most,								\
		.values = _values,							\
		.live = _live,								\
	};										\
	module_param_cb(_name, &sample_param_ops, &sample_param_##_name, 0644);		\
	MODULE_PARM_DESC(_name, _text)
#include "param_list.h"

static char sample_param_fault[SAMPLE_FAULT_BYTES];
module_param_string(fault, sample_param_fault, SAMPLE_FAULT_BYTES, 0644);
MODULE_PARM_DESC(fault, "call:number: that call of a device fails, e.g. save:3");

/* Those of a new device. */
int sample_params_init(struct sample_params *params)
{
#define SAMPLE_PARAM(name, ...) (params->name = READ_ONCE(sample_param_##name.value))
#include "param_list.h"
	strscpy(params->fault, sample_param_fault);
	strim(params->fault);
	if (params->size_kib % params->block_kib || params->size_kib < params->block_kib) {
		pr_err("size_kib=%u is not a multiple of block_kib=%u\n", params->size_kib,
		       params->block_kib);
		return -EINVAL;
	}
	return 0;
}

static void sample_param_show(struct seq_file *file, const struct sample_param *param, u32 value)
{
	if (param->values)
		seq_printf(file, "%s %s\n", param->name, param->values[value]);
	else
		seq_printf(file, "%s %u\n", param->name, value);
}

void sample_params_show(struct seq_file *file, const struct sample_params *params)
{
#define SAMPLE_PARAM(name, ...) sample_param_show(file, &sample_param_##name, params->name)
#include "param_list.h"
	seq_printf(file, "fault %s\n", params->fault);
}

/* 0 if it is this one and was changed, -ENOENT if it is another one. */
static int sample_param_change(const struct sample_param *param, u32 *value, const char *name,
			       const char *text)
{
	if (strcmp(param->name, name))
		return -ENOENT;
	return param->live ? sample_param_parse(param, text, value) : -EPERM;
}

/* "name value" or "name=value". -EPERM: it cannot be changed any more. */
int sample_params_change(struct sample_params *params, char *text)
{
	char *value = strim(text);
	char *name = strsep(&value, " =");
	int ret = -ENOENT;

	value = value ? strim(value) : "";
	if (!strcmp(name, "fault"))
		return strscpy(params->fault, value) < 0 ? -E2BIG : 0;
#define SAMPLE_PARAM(_name, ...)							\
	(ret = ret != -ENOENT ? ret : sample_param_change(&sample_param_##_name,	\
							  &params->_name, name, value))
#include "param_list.h"
	return ret;
}
