#!/bin/sh
# SPDX-License-Identifier: Apache-2.0 OR MIT
# The first process on a small root disk: runs /run/script, and takes the disk down as a machine that is shut down does.
/usr/bin/busybox mkdir /run/bin
/usr/bin/busybox --install -s /run/bin
export PATH=/usr/sbin:/usr/bin:/run/bin
mount -t tmpfs tmpfs /tmp
cp /run/lease /lease
. /run/settings
. /run/library
. /run/script
sync
check root-read-only mount -o remount,ro /
mark done
poweroff -f
