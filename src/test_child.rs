//! Processes of tests, which end with them.

use std::{
    fs,
    process::{Child, Command},
    thread,
    time::{Duration, Instant},
};

/// Killed in the end.
pub(crate) struct TestChild(Child);

impl TestChild {
    /// One that runs all the time.
    pub(crate) fn busy() -> Self {
        let mut command = Command::new("sh");
        command.args(["-c", "while :; do :; done"]);
        Self(command.spawn().unwrap())
    }

    /// A `sleep` that has come to rest.
    pub(crate) fn asleep() -> Self {
        let mut command = Command::new("sleep");
        command.arg("1000");
        Self::asleep_as(command)
    }

    /// Runs the command, which ends in a `sleep`, and waits until that does nothing else.
    ///
    /// Its name alone wouldn't tell: it has it while it still closes what the exec closes, is loaded,
    /// and waits for its libraries.
    pub(crate) fn asleep_as(mut command: Command) -> Self {
        let child = Self(command.spawn().unwrap());
        let sleeps = [libc::SYS_nanosleep, libc::SYS_clock_nanosleep].map(|call| call.to_string());
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let call = fs::read_to_string(format!("/proc/{}/syscall", child.pid())).unwrap();
            let number = call.split(' ').next().unwrap();
            if sleeps.iter().any(|sleep| sleep == number) {
                return child;
            }
            assert!(Instant::now() < deadline, "it does not sleep: {call}");
            thread::sleep(Duration::from_millis(1));
        }
    }

    pub(crate) fn pid(&self) -> i32 {
        self.0.id().cast_signed()
    }
}

impl Drop for TestChild {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
