"""Programs at work in a sandbox, each a generator: what runs before a `yield` brings the work to a random moment, where
a checkpoint is taken; behind it the sandbox has come back, and must go on to the right end.

`random` is seeded: a moment is a point of the work's own progress, so a failure can be had again.
"""

import os

from harness import IMAGE, SERVERS, until

COUNTER = """
import ctypes, json, os
file = os.open("/count", os.O_RDWR | os.O_CREAT)
number = ctypes.c_uint64(0)
with open("/where.new", "w") as where:
    json.dump({"pid": os.getpid(), "address": ctypes.addressof(number), "file": "/count"}, where)
os.pwrite(file, bytes(8), 0)
os.rename("/where.new", "/where")
while True:
    written = int.from_bytes(os.pread(file, 8, 0), "little")
    assert written == number.value, (written, number.value)
    number.value += 1
    os.pwrite(file, number.value.to_bytes(8, "little"), 0)
"""


def counter(box, random):
    """A number in memory and the same in a file, in a tight loop: never further apart than one step."""
    import json

    def count():
        return int.from_bytes((box.root / "count").read_bytes(), "little")

    box.background("python3", "-c", COUNTER)
    box.peek = json.loads(until(lambda: box.read("/where"), "it counts"))
    for _ in range(3):
        goal = count() + random.randint(1, 20_000)
        until(lambda: count() >= goal, "it counts")
        yield
        seen = box.peeked
        print(f"  in memory and in the file: {seen}")
        assert seen[0] == seen[1] and all(0 <= number - written <= 1 for number, written in seen), seen
        assert seen[0][1] >= goal
        until(lambda: count() > seen[1][0] + 1000, "it goes on")
        assert not box.read("/log.rc"), box.read("/log")


def repl(box, random):
    """A python in tmux, with variables, in the middle of a loop."""
    box.sh("""
        tmux new-session -d -x 100 -y 30 python3 -q
        until tmux capture-pane -p | grep -q '>>>'; do sleep 0.02; done
        tmux send-keys "words = {n: str(n) for n in range(50_000)}; seen = []; import time" Enter
        tmux send-keys "_ = [(seen.append(n), time.sleep(0.001), open('/n', 'w').write(str(n))) for n in range(1500)]" Enter""")
    goal = random.randint(1, 1000)
    until(lambda: box.number("/n") >= goal, "the loop runs")
    yield
    # Its line editor takes what is typed meanwhile for something else.
    until(lambda: box.number("/n") == 1499 and box.exec("tmux", "capture-pane", "-p").out.rstrip().endswith(">>>"), "the loop ends")
    typed = "print('so', seen == list(range(1500)), len(words), words[49_999], 'far')"
    box.exec("tmux", "send-keys", typed, "Enter")
    until(lambda: "so True 50000 49999 far\n" in box.exec("tmux", "capture-pane", "-p").out, "what was typed is answered")


REPOSITORY = """
import sys
out = lambda text: sys.stdout.buffer.write(text.encode())
def commit(branch, mark, parent, message, *files):
    out(f"commit refs/heads/{branch}\\nmark :{mark}\\ncommitter a <a@b> {1700000000 + mark} +0000\\ndata {len(message)}\\n{message}\\n")
    if parent: out(f"from :{parent}\\n")
    for name, text in files: out(f"M 644 inline {name}\\ndata {len(text)}\\n{text}\\n")
commit("main", 1, None, "begin", ("shared", "one\\n"))
for n in range(2, 302): commit("topic", n, n - 1, f"topic {n}", (f"files/{n}", f"{n}\\n" * 200), ("log", f"{n}\\n"))
commit("main", 1000, 1, "meanwhile", ("shared", "two\\n"))
commit("clash", 1001, 1, "clash", ("shared", "three\\n"))
"""


def rebase(box, random):
    """git in the middle of a rebase, and in a conflict that waits for somebody to solve it."""
    box.exec("sh", "-c", """
        set -e; export HOME=/; git config --global user.name a; git config --global user.email a@b; git config --global gc.auto 0
        for repo in /busy /clash; do git init -q -b main $repo; python3 -c "$1" | git -C $repo fast-import --quiet; done
        git -C /busy checkout -q topic; git -C /clash checkout -q clash
        ! git -C /clash rebase main >/clash.log 2>&1""", "sh", REPOSITORY)
    box.background("env", "HOME=/", "git", "-C", "/busy", "rebase", "main")
    goal = random.randint(1, 200)
    until(lambda: box.number("/busy/.git/rebase-merge/msgnum") >= goal, "the rebase is under way")
    yield
    until(lambda: box.read("/log.rc"), "git ends")
    if box.read("/log.rc") != "0\n":
        # Files have other inodes and another ctime now, by which git tells whether somebody has changed them.
        assert "git rebase --continue" in box.read("/log"), box.read("/log")
    said = box.sh("""
        export HOME=/; cd /busy; ! test -d .git/rebase-merge || git rebase --continue >/continued 2>&1 || cat /continued
        git fsck --strict 2>&1; git status --porcelain; git rev-list --count main..topic; cat files/* | wc -l; cat log shared
        cd /clash; git status --porcelain; printf 'four\\n' >shared; git add shared; GIT_EDITOR=true git rebase --continue >/dev/null; git status --porcelain; git log --format=%s""")
    assert said.split("\n") == ["300", "60000", "301", "two", "UU shared", "clash", "meanwhile", "begin", ""], said


TRANSACTION = """
import os, sqlite3, sys, time
mode, fate = sys.argv[1:]
name = f"/{mode}-{fate}"
db = sqlite3.connect(name + ".db", isolation_level=None)
# A small cache: pages of the open transaction are in the files, too, and a journal holds what they were.
# A WAL's index in shared memory has locks that CRIU loses, so that crab keeps no such process (test_poison.py).
for pragma in ("locking_mode=exclusive", f"journal_mode={mode}", "cache_size=8", "synchronous=off"):
    db.execute(f"pragma {pragma}")
db.execute("create table t (n integer primary key, text text)")
db.execute("begin"); db.executemany("insert into t values (?, ?)", [(n, "old" * 200) for n in range(100)]); db.execute("commit")
db.execute("begin immediate")
for n in range(100, 1_000_000):
    db.execute("insert into t values (?, ?)", (n, "new" * 200))
    db.execute("update t set text = ? where n = ?", ("changed", n % 100))
    open(name + ".n", "w").write(str(n))
    if os.path.exists("/end"):
        if fate == "killed": os.kill(os.getpid(), 9)
        break
    time.sleep(0.001)
db.execute("commit")
print(n)
"""


def sqlite(box, random):
    """Databases in the middle of a transaction, with a rollback journal and with a WAL. One of each commits
    afterwards, the other is killed, and the next who opens it finds what was there before."""
    kinds = [(mode, fate) for mode in ("delete", "wal") for fate in ("committed", "killed")]
    for mode, fate in kinds:
        box.background("python3", "-c", TRANSACTION, mode, fate, log=f"/{mode}-{fate}")
    goal = random.randint(150, 500)
    until(lambda: all(box.number(f"/{mode}-{fate}.n") >= goal for mode, fate in kinds), "all transactions are open")
    yield
    assert {"/delete-killed.db-journal", "/wal-killed.db-wal"} <= set(box.names), box.names
    (box.root / "end").touch()
    for mode, fate in kinds:
        until(lambda: box.read(f"/{mode}-{fate}.rc"), f"the end of the transaction, {mode}, {fate}")
        says, code = box.read(f"/{mode}-{fate}"), box.number(f"/{mode}-{fate}.rc")
        assert code == (137 if fate == "killed" else 0), (mode, fate, code, says)
        found = box.exec("python3", "-c", """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1])
print(*db.execute("pragma integrity_check").fetchone(), *db.execute("select count(*), sum(text like 'old%') from t").fetchone())""", f"/{mode}-{fate}.db").out
        # The number of the last row, from 0.
        wanted = "ok 100 100\n" if fate == "killed" else f"ok {int(says) + 1} 0\n"
        assert found == wanted, (mode, fate, found, says)


LOAD = """
import os, socket, sys
connection = socket.create_connection(("127.0.0.1", 6379))
answers, n = connection.makefile("rb"), 0
while not os.path.exists("/end"):
    n += 1
    value = b"%d" % n * 50
    connection.sendall(b"INCR n\\r\\nSET key%d %s\\r\\nGET key%d\\r\\n" % (n % 1000, value, n % 1000))
    said = [answers.readline() for _ in range(3)] + [answers.read(len(value) + 2)]
    assert said == [b":%d\\r\\n" % n, b"+OK\\r\\n", b"$%d\\r\\n" % len(value), value + b"\\r\\n"], (n, said)
    if n % 100 == 0:
        open("/n", "w").write(str(n))
print(n)
"""


def redis(box, random):
    """A redis with an append-only file, and a client that asks as fast as it can through an open connection."""
    box.sh("mkdir /data; redis-server --daemonize yes --dir /data --appendonly yes --logfile /data/log >/dev/null; until redis-cli ping >/dev/null 2>&1; do sleep 0.02; done")
    box.background("python3", "-c", LOAD)
    goal = random.randint(100, 5000)
    until(lambda: box.number("/n") >= goal or box.read("/log.rc"), "redis has work")
    yield
    at = box.number("/n")
    until(lambda: box.number("/n") >= at + 500 or box.read("/log.rc"), "the connection goes on")
    (box.root / "end").touch()
    box.ended()
    said = box.sh("redis-cli get n; redis-cli shutdown; redis-server --daemonize yes --dir /data --appendonly yes >/dev/null; until redis-cli get n 2>/dev/null | grep '[0-9]'; do sleep 0.02; done; redis-cli dbsize")
    count = int(box.read("/log"))
    assert said.split() == [str(count), str(count), str(min(count, 1000) + 1)], (said, count)


ASK = """
import http.client, os, sys
page = open("/var/www/html/page").read()
connection, n = http.client.HTTPConnection("127.0.0.1"), 0
connection.connect()
kept = connection.sock
while not os.path.exists("/end"):
    connection.request("GET", "/page")
    answer = connection.getresponse()
    assert answer.status == 200 and answer.read().decode() == page
    assert connection.sock is kept, "nginx has closed the connection"
    n += 1
    open(f"/n{sys.argv[1]}", "w").write(str(n))
print(n)
"""


def nginx(box, random):
    """nginx and two clients, each with one connection that it keeps."""
    clients = ("1", "2")
    # The cut lasts as long as its state is read, which emulated is longer than nginx would wait for a client's next word.
    patient = " ".join(f"{what} 1h;" for what in ("keepalive_timeout", "client_header_timeout", "send_timeout"))
    box.sh(f"""
        seq 20000 >/var/www/html/page
        sed -i '/keepalive_timeout/d; s/^http {{/http {{ keepalive_requests 1000000; {patient}/' /etc/nginx/nginx.conf
        nginx""")
    for client in clients:
        box.background("python3", "-c", ASK, client, log=f"/log{client}")

    def ask_on():
        goal = {client: box.number(f"/n{client}") + random.randint(10, 300) for client in clients}
        until(lambda: all(box.number(f"/n{client}") >= goal[client] or box.read(f"/log{client}.rc") for client in clients), "both are answered")

    ask_on()
    yield
    ask_on()
    (box.root / "end").touch()
    for client in clients:
        box.ended(log=f"/log{client}")
    asked = sum(int(box.read(f"/log{client}")) for client in clients)
    assert len(box.read("/var/log/nginx/access.log").splitlines()) == asked


SOURCES = """
import os
os.makedirs("/build"); os.chdir("/build")
names = [f"f{n}" for n in range(150)]
for n, name in enumerate(names):
    with open(f"{name}.c", "w") as file:
        for i in range(1000):
            file.write(f"static int part{i}(int a) {{ int b = a; for (int i = 0; i < {i}; i++) b = b * 3 + i; return b & 0xff; }}\\n")
        # part0(n) is n.
        file.write(f"int {name}(void) {{ return part7({n}) * 0 + part0({n}) + {n}; }}\\n")
with open("all.c", "w") as file:
    file.write("".join(f"int {name}(void);\\n" for name in names) + "int all(void) { return " + " + ".join(f"{name}()" for name in names) + "; }\\n")
with open("start.c", "w") as file:
    file.write('int all(void); void _start(void) { int code = all() == %d ? 7 : 1; __asm__ volatile ("syscall" :: "a"(60), "D"(code)); }' % sum(2 * n for n in range(len(names))))
with open("Makefile", "w") as file:
    file.write("CC = tcc\\nprogram: " + " ".join(f"{name}.o" for name in [*names, "all", "start"]) + "\\n\\t$(CC) -nostdlib -o $@ $^\\n")
"""


def compile(box, random):
    """make with two jobs."""
    box.exec("python3", "-c", SOURCES)
    box.background("make", "-C", "/build", "-j2", "CFLAGS=-fPIC")
    goal = random.randint(1, 120)
    until(lambda: box.read("/log.rc") or len([*(box.root / "build").glob("*.o")]) >= goal, "make is at work")
    yield
    assert "/build/program" not in box.names, "the compile was still under way"
    box.ended()
    assert box.sh("make -C /build -q; echo $?; /build/program; echo $?") == "0\n7\n"


PACKAGES = """
import os, tarfile, zipfile, io
os.makedirs("/packages"); os.chdir("/packages")
for n in range(30):
    files = {f"wheel{n}/m{i}.py": f"value = {i}\\n" * 200 for i in range(20)} | {f"wheel{n}/__init__.py": ""}
    info = f"wheel{n}-1.0.dist-info"
    files |= {f"{info}/METADATA": f"Metadata-Version: 2.1\\nName: wheel{n}\\nVersion: 1.0\\n",
              f"{info}/WHEEL": "Wheel-Version: 1.0\\nGenerator: test\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"}
    files[f"{info}/RECORD"] = "".join(f"{name},,\\n" for name in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(f"wheel{n}-1.0-py3-none-any.whl", "w") as wheel:
        for name, text in files.items(): wheel.writestr(name, text)
for n in range(2):
    with tarfile.open(f"source{n}-1.0.tar.gz", "w:gz") as archive:
        files = {"pyproject.toml": "[build-system]\\nrequires = ['setuptools']\\nbuild-backend = 'setuptools.build_meta'\\n"
                                   f"[project]\\nname = 'source{n}'\\nversion = '1.0'\\n", f"source{n}/__init__.py": f"value = {n}\\n"}
        for name, text in files.items():
            entry = tarfile.TarInfo(f"source{n}-1.0/{name}"); entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text.encode()))
"""
INSTALLED = """
import importlib, importlib.metadata, os
names = [f"wheel{n}" for n in range(30)] + [f"source{n}" for n in range(2)]
for name in names:
    for file in importlib.metadata.files(name):
        path = file.locate()
        assert path.exists() and (file.hash is None or file.size == path.stat().st_size), path
assert importlib.import_module("source1").value == 1
assert all(importlib.import_module(f"wheel{n}.m{i}").value == i for n in range(30) for i in range(20))
print(len(names), [name for name in os.listdir("/tmp") if name.startswith("pip-")])
"""


def pip(box, random):
    """pip, which builds two packages and installs these and thirty more."""
    box.exec("python3", "-c", PACKAGES)
    box.background("sh", "-c", "exec pip install --no-index --no-build-isolation --break-system-packages --root-user-action ignore --no-cache-dir /packages/*")
    goal = random.randint(1, 40)
    until(lambda: box.read("/log").count("\n") >= goal, "pip is at work")
    yield
    assert "/log.rc" not in box.names, "pip was still at work"
    box.ended()
    assert box.exec("python3", "-c", INSTALLED).out == "32 []\n"


PROGRAMS = {
    "ctr": [(repl, IMAGE), (rebase, IMAGE), (sqlite, IMAGE), (counter, IMAGE), (redis, SERVERS), (nginx, SERVERS), (compile, SERVERS), (pip, SERVERS)],
    "docker": [(counter, IMAGE), (repl, IMAGE), (sqlite, IMAGE)],
}
if os.environ.get("CRAB_SOAK"):
    PROGRAMS["docker"].append((nginx, SERVERS))
