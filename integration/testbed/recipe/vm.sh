# Runs inside the base: makes it what starts virtual machines. QEMU and virtiofsd are installed; the kernel, its modules
# and what loads them are only unpacked: /vm/vmlinuz stays here, /vm/layer goes on top of the bed's root.
set -euo pipefail
cat >/etc/dpkg/dpkg.cfg.d/crab-vm <<'END'
force-unsafe-io
path-exclude=/usr/share/doc/*
path-exclude=/usr/share/man/*
path-exclude=/usr/share/locale/*
path-exclude=/usr/share/info/*
END
echo 'Acquire::Languages "none";' >/etc/apt/apt.conf.d/90crab-vm
apt-get update -q
apt-get install -y -q --no-install-recommends qemu-system-x86 virtiofsd kmod
qemu=$(dpkg-query -Wf '${Version}' qemu-system-x86)
# QEMU 7.2's emulation breaks this kernel (double faults in cmpxchg16b).
dpkg --compare-versions "$qemu" ge 1:10 || { echo "QEMU is $qemu, not 10 or newer" >&2; exit 1; }

# Not installed: that would want an initramfs and a boot loader.
kernel=$(apt-cache depends --important linux-image-cloud-amd64 | sed -n 's/^ *Depends: \(linux-image-.*\)/\1/p')
apt-get install -y -q --no-install-recommends --download-only "$kernel"
mkdir -p /vm/kernel /vm/layer/usr/lib
version=$(apt-cache show --no-all-versions "$kernel" | sed -n 's/^Version: //p')
dpkg-deb -x "/var/cache/apt/archives/${kernel}_${version/:/%3a}_amd64.deb" /vm/kernel
mv /vm/kernel/boot/vmlinuz-* /vm/vmlinuz
mv /vm/kernel/usr/lib/modules /vm/layer/usr/lib/
rm -rf /vm/kernel
depmod -b /vm/layer -m /usr/lib/modules "$(ls /vm/layer/usr/lib/modules)"
dpkg -L kmod libkmod2 | grep -E '^/usr/(bin|sbin|lib/x86_64-linux-gnu)/' | tar -C / -cf - --no-recursion -T - | tar -C /vm/layer -xf -
rm -rf /var/lib/apt/lists/*
