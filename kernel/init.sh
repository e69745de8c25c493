#!/busybox sh
# SPDX-License-Identifier: GPL-2.0-or-later
# The guest's first process. kernel/guest.py made the folder that is its root: busybox, this file, empty mount points, and
#   mounts   a line for each folder of the host: ro or rw, and its path, the same on both sides
#   modules  a line for each module: its file, its parameters
#   command  a shell script
# At the end it has, besides, status (of the command) and dmesg.

/busybox mount -t proc proc /proc
/busybox mount -t sysfs sysfs /sys
/busybox mount -t debugfs debugfs /sys/kernel/debug
/busybox mount -t devtmpfs devtmpfs /dev
/busybox mkdir /dev/pts /dev/shm
/busybox mount -t devpts devpts /dev/pts
for place in /dev/shm /tmp /run; do
	/busybox mount -t tmpfs tmpfs $place
done
/busybox ln -s /proc/self/fd /dev/fd
/busybox ip link set lo up

output=/dev/ttyS0
/busybox stty -F $output raw -echo

fail() {
	echo "guest: $1" > $output
	status=125
}

status=
while read -r access place; do
	/busybox mkdir -p "$place" 2> /dev/null
	/busybox mount -t hostfs -o "$access,$place" none "$place" || fail "$place cannot be mounted"
done < /mounts
while read -r module; do
	message=$(echo "$module" | /busybox xargs /busybox insmod 2>&1) || fail "$message"
done < /modules

# The command writes into a pipe, not to a terminal.
if [ -z "$status" ]; then
	{ /bin/sh /command < /dev/null; echo $? > /run/status; } 2>&1 | /busybox cat > $output
	read -r status < /run/status
fi

/busybox sync
/busybox mount -o remount,rw /
/busybox dmesg > /dmesg
echo "$status" > /status
/busybox sync
/busybox halt -f
