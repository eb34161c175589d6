# lab: its parts, each behind those that it waits for. `vmsg up` also restarts what fails, and ends all together.
cd /d
mkdir -p -m 700 /run/vmsg/lab
rm -f /run/vmsg/lab/*.out

# first: waits for nothing
sh \
  -c 'echo it'\''s up' > /run/vmsg/lab/first.out &

# serve: waits for first
until grep -qF 'it'\''s up' /run/vmsg/lab/first.out; do sleep 0.1; done
vmsg serve \
  --control /run/vmsg/lab/serve.sock \
  --workers 2 \
  --bus unix,path=/run/vmsg/lab/b1.sock \
  --bus unix,mode=0660,path=/run/vmsg/lab/b2.sock \
  --switch 'id=s0,worker=1,allow=* <> *' \
  --port id=net1,rate-in=100M \
  --uplink id=up,switch=s0,backend=tap \
  --device net,id=net1,switch=s0,bus=b1,num=0,mac=52:54:00:9b:de:50 \
  --device net,id=net2,switch=s0,bus=b2,num=0,mac=52:54:00:56:dd:51 \
  --device rng,id=rng2,bus=b2,num=1 > /run/vmsg/lab/serve.out &

# vm1.proxy: waits for serve
until [ "$(grep -c '^ready bus=' /run/vmsg/lab/serve.out)" -ge 2 ]; do sleep 0.1; done
vmsg proxy \
  --bus unix,path=/run/vmsg/lab/b1.sock \
  --front vhost-user,socket=/run/vmsg/lab/vm1.net1.sock,dev=net1,bus=b1 > /run/vmsg/lab/vm1.proxy.out &

# vm1: waits for vm1.proxy; its serial line: socat -,raw,echo=0 UNIX-CONNECT:/run/vmsg/lab/vm1.serial
until [ "$(grep -c '^ready front=' /run/vmsg/lab/vm1.proxy.out)" -ge 1 ]; do sleep 0.1; done
qemu-system-x86_64 \
  -name vm1 \
  -nodefaults \
  -no-user-config \
  -display none \
  -accel tcg \
  -cpu qemu64,+rdrand \
  -smp 1 \
  -machine q35,memory-backend=mem \
  -m 256M \
  -object memory-backend-memfd,id=mem,size=256M,share=on \
  -kernel vmlinuz \
  -append 'console=ttyS0 panic=-1' \
  -chardev socket,id=qmp,path=/run/vmsg/lab/vm1.qmp,server=on,wait=off \
  -mon chardev=qmp,mode=control \
  -chardev socket,id=serial,path=/run/vmsg/lab/vm1.serial,server=on,wait=off \
  -serial chardev:serial \
  -device pcie-root-port,id=hotplug0,bus=pcie.0,chassis=1,slot=1 \
  -chardev socket,id=vmsg-net1,path=/run/vmsg/lab/vm1.net1.sock,reconnect=1 \
  -netdev vhost-user,id=net-net1,chardev=vmsg-net1 \
  -device virtio-net-pci,netdev=net-net1,mac=52:54:00:9b:de:50,vectors=0,romfile=,id=dev-net1 &

# vm2.proxy: waits for serve
until [ "$(grep -c '^ready bus=' /run/vmsg/lab/serve.out)" -ge 2 ]; do sleep 0.1; done
vmsg proxy \
  --bus unix,path=/run/vmsg/lab/b2.sock \
  --front vfio-user,socket=/run/vmsg/lab/vm2.net2.sock,dev=net2,bus=b2,isolate=on \
  --front vfio-user,socket=/run/vmsg/lab/vm2.rng2.sock,dev=rng2,bus=b2,isolate=on > /run/vmsg/lab/vm2.proxy.out &

# vm2: waits for vm2.proxy
until [ "$(grep -c '^ready front=' /run/vmsg/lab/vm2.proxy.out)" -ge 2 ]; do sleep 0.1; done
qemu-new \
  -name vm2 \
  -nodefaults \
  -no-user-config \
  -display none \
  -accel tcg \
  -cpu max,pauth-impdef=on \
  -smp 1 \
  -machine virt,memory-backend=mem \
  -m 256M \
  -object memory-backend-memfd,id=mem,size=256M,share=on \
  -global virtio-mmio.force-legacy=false \
  -chardev socket,id=qmp,path=/run/vmsg/lab/vm2.qmp,server=on,wait=off \
  -mon chardev=qmp,mode=control \
  -device '{"driver":"vfio-user-pci","socket":{"type":"unix","path":"/run/vmsg/lab/vm2.net2.sock"}}' \
  -device '{"driver":"vfio-user-pci","socket":{"type":"unix","path":"/run/vmsg/lab/vm2.rng2.sock"}}' \
  -drive 'file=disk 1.img' &

# probe: waits for vm1
until [ -S /run/vmsg/lab/vm1.qmp ]; do sleep 0.1; done
sh \
  -c 'sleep 5' &
