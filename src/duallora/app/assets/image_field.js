// Sends what was dropped or chosen, a few files at a time; what was given before is given up. The value is
// "" for nothing, "sending", or a list of { path, orig_name }. Hidden files are not sent.
const zone = element.querySelector(".drop"), input = element.querySelector("input[type=file]");
const said = element.querySelector(".field-said"), clear = element.querySelector(".field-clear");
const hidden = (name) => name.split("/").some((part) => /^[.]|^__MACOSX$/.test(part));
const say = (text) => { said.textContent = text; };
let turn = 0;
const empty = (text) => {
  turn += 1;
  props.value = "";
  input.value = "";
  clear.hidden = true;
  say(text);
};
const named = (files) => {
  const names = files.map(({ name }) => name.split("/").pop());
  const more = names.length - 2;
  return more > 1 ? `${names.slice(0, 2).join(", ")} and ${more} more` : names.join(", ");
};
const take = async (given) => {
  const files = given.filter(({ name }) => !hidden(name)), all = files.length, waiting = [...files], sent = [];
  if (all > MOST) return empty(`These are more than ${MOST} files; choose fewer.`);
  if (!all) return empty("There are no files in it.");
  const mine = ++turn, started = performance.now();
  props.value = '"sending"';
  clear.hidden = false;
  const send = async () => {
    while (waiting.length && mine === turn) {
      const { file, name } = waiting.shift(), { path } = await upload(file);
      sent.push({ path, orig_name: name });
      const left = timeLeft(started, sent.length / all);
      if (mine === turn) say(`${sent.length} of ${all} files sent${left && ", " + left}.`);
    }
  };
  try {
    await Promise.all([send(), send(), send(), send()]);
    if (mine !== turn) return;
    props.value = JSON.stringify(sent);
    say(`${all} ${all === 1 ? "file" : "files"} ready: ${named(files)}.`);
  } catch (error) {
    empty("The files could not be sent; type the path of their folder instead.");
  }
};
const inside = (entry) => new Promise((done, failed) => {
  if (entry.isFile) return entry.file((file) => done([{ file, name: entry.fullPath.slice(1) }]), failed);
  const reader = entry.createReader(), found = [];
  const more = () => reader.readEntries(async (entries) => { // gives a hundred at a time
    if (!entries.length) return done((await Promise.all(found.map(inside))).flat());
    found.push(...entries);
    more();
  }, failed);
  more();
});
input.addEventListener("change", () => {
  if (input.files.length) take([...input.files].map((file) => ({ file, name: file.webkitRelativePath || file.name })));
});
clear.addEventListener("click", () => { empty("Taken out."); input.focus(); });
if (zone) {
  const over = (event, on) => { event.preventDefault(); zone.classList.toggle("over", on); };
  zone.addEventListener("dragover", (event) => over(event, true));
  zone.addEventListener("dragleave", (event) => over(event, false));
  zone.addEventListener("drop", async (event) => {
    over(event, false);
    // Both are gone once the event is over. What does not come from a folder of the disk has no entries.
    const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry()).filter(Boolean);
    const loose = [...event.dataTransfer.files].map((file) => ({ file, name: file.name }));
    try {
      take(entries.length ? (await Promise.all(entries.map(inside))).flat() : loose);
    } catch (error) {
      empty("The browser could not read what was dropped; choose it instead.");
    }
  });
}
watch("value", () => { if (props.value === "") empty(""); });
