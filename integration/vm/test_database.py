"""A database server of a user of its own goes on in the middle of a transaction."""

from harness import crab, until
from test_armed_restore import Sandbox

IMAGE = "crab.test/database:latest"
AS = "setpriv --reuid=postgres --regid=postgres --init-groups"
START = f"""install -d -o postgres /run/postgresql
{AS} /usr/lib/postgresql/17/bin/pg_ctl -w -t 120 -l /tmp/log -D /var/lib/postgresql/17/main \
    -o '-c config_file=/etc/postgresql/17/main/postgresql.conf' start >/dev/null
{AS} psql -qc 'create table counted (n int); insert into counted values (1)'"""
SESSION = f"""mkfifo -m 666 /tmp/in
nohup {AS} psql -q 0<>/tmp/in >/tmp/out 2>&1 &
echo "begin; insert into counted values (2); select 'begun';" >/tmp/in"""
"""A client inside, who has begun and not committed."""
ROWS = f"{AS} psql -Atc 'select n from counted order by n'"
COMMIT = "echo \"commit; select 'committed';\" >/tmp/in"


def test_an_open_transaction_goes_on_after_a_crash_and_a_rollback(tmp_path):
    with Sandbox("ctr", tmp_path, image=IMAGE) as sandbox:
        def rows():
            return sandbox.sh(ROWS).split()

        def commit():
            sandbox.sh(COMMIT)
            until(lambda: "committed" in sandbox.sh("cat /tmp/out"), "committed")

        sandbox.sh(START)
        sandbox.sh(SESSION)
        until(lambda: "begun" in sandbox.sh("cat /tmp/out"), "begun")
        assert rows() == ["1"]
        crab("checkpoint", sandbox.name, "--name", "open")
        owners = sandbox.sh("stat -c %U $(pgrep -f ^postgres | sed 's,^,/proc/,')").split()
        assert len(owners) > 5 and set(owners) == {"postgres"}, owners
        commit()
        sandbox.sh(f"{AS} psql -qc 'insert into counted values (3)'")
        assert rows() == ["1", "2", "3"]

        sandbox.die()
        sandbox.restore("@open")
        sandbox.start()
        assert rows() == ["1"], "what was not committed is still open"
        commit()
        assert rows() == ["1", "2"], "in the same transaction"
        sandbox.turn()

        crab("rollback", f"{sandbox.name}@open")
        assert rows() == ["1"]
        commit()
        assert rows() == ["1", "2"]
