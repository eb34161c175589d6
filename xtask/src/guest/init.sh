#!/bin/sh
# SPDX-License-Identifier: Apache-2.0 OR MIT
# The guest's first process: mounts, inserts the modules, names the network devices, runs /script, powers off.
/bin/busybox mount -t devtmpfs devtmpfs /dev
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox --install -s /bin
export PATH=/bin
stty -echo
. /settings
. /library
mark booted "$(uname -r)"
while read -r module; do
    insmod "$module" || fail "insmod $module"
done < /modules/order
. /script
mark done
poweroff -f
