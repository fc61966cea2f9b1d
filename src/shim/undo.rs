//! What must be taken back when something half-done fails.

type Step = Box<dyn FnOnce() -> Result<(), String>>;

/// Steps that are taken when this is dropped, the last one first.
#[derive(Default)]
pub struct Undo(Vec<Step>);

impl Undo {
    /// Nothing to undo yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Something was done; `step` takes it back.
    pub fn push(&mut self, step: impl FnOnce() -> Result<(), String> + 'static) {
        self.0.push(Box::new(step));
    }

    /// All went well.
    pub fn forget(mut self) {
        self.0.clear();
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        while let Some(step) = self.0.pop() {
            if let Err(e) = step() {
                log::error!("clean-up: {e}");
            }
        }
    }
}
