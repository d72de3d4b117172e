// One frame at a time: the next one is taken when the answer is there, at most BUSIEST a second.
const BUSIEST = 6, LOST = 5;
const find = (name) => element.querySelector(`.camera-${name}`);
const video = find("picture"), start = find("start"), keep = find("take"), said = find("said");
const answer = find("answer"), spoken = find("class");
const canvas = document.createElement("canvas");
const context = canvas.getContext("2d", { willReadFrequently: true });
let stream = null, turn = 0;

const REASONS = {
  NotAllowedError: "The browser does not let this page use the camera; allow it beside the address, and start again.",
  NotFoundError: "There is no camera; connect one and start again, or try a picture.",
  NotReadableError: "The camera does not answer; close other programs that use it, and start again.",
};
const why = (error) => REASONS[error.name]
  || "The camera could not be started; check it, and start again, or try a picture.";
const say = (text) => { said.textContent = text; };

const stop = (text) => {
  turn += 1;
  if (stream) stream.getTracks().forEach((track) => track.stop());
  stream = null;
  video.srcObject = null;
  answer.innerHTML = "";
  video.hidden = keep.hidden = true;
  find("rate").textContent = spoken.textContent = "";
  start.disabled = false;
  start.textContent = "Start the camera";
  say(text);
};

const pixels = () => {
  const scale = Math.min(1, EDGE / Math.min(video.videoWidth, video.videoHeight));
  const width = Math.round(video.videoWidth * scale), height = Math.round(video.videoHeight * scale);
  Object.assign(canvas, { width, height });
  context.imageSmoothingQuality = "high";
  context.drawImage(video, 0, 0, width, height);
  const { data } = context.getImageData(0, 0, width, height), rgb = new Uint8Array(width * height * 3);
  for (let from = 0, to = 0; from < data.length; from += 4) {
    rgb[to++] = data[from];
    rgb[to++] = data[from + 1];
    rgb[to++] = data[from + 2];
  }
  let text = "";
  for (let at = 0; at < rgb.length; at += 8192) text += String.fromCharCode(...rgb.subarray(at, at + 8192));
  const below = Number(document.querySelector("#unknown-below input[type=number]")?.value ?? 0.2);
  return { width, height, rgb: btoa(text), below };
};

const wait = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));
const follow = async (mine) => {
  let lost = 0, last = "", since = performance.now(), answered = 0;
  while (mine === turn) {
    const began = performance.now();
    // A view that is left needs no camera; neither does a window that nobody sees.
    if (!element.offsetParent || document.hidden) return stop("The camera is off, for this view was left.");
    if (video.videoWidth) {
      try {
        const found = await server.answer_frame(pixels());
        if (mine !== turn) return;
        if (found.html) {
          if (found.failed) {
            stop("The camera is off.");
            answer.innerHTML = found.html;
            return;
          }
          answer.innerHTML = found.html;
          lost = 0;
          answered += 1;
          if (found.name !== last) spoken.textContent = last = found.name;
        }
      } catch (error) {
        lost += 1;
        if (lost === LOST) return stop("The program does not answer any more; is it still running?");
      }
    }
    const passed = (performance.now() - since) / 1000;
    if (passed > 2) {
      const rate = answered / passed;
      find("rate").textContent = `${rate.toFixed(1)} answers a second`;
      since = performance.now();
      answered = 0;
    }
    await wait(Math.max(1000 / BUSIEST - (performance.now() - began), 0));
  }
};

start.addEventListener("click", async () => {
  if (stream) return stop("The camera is off.");
  start.disabled = true;
  say("Waiting for the camera.");
  const mine = ++turn;
  try {
    if (!navigator.mediaDevices) throw new Error("this browser has none");
    const wanted = { width: { ideal: 640 }, height: { ideal: 480 }, facingMode: "environment" };
    stream = await navigator.mediaDevices.getUserMedia({ video: wanted, audio: false });
    video.srcObject = stream;
    stream.getVideoTracks()[0].addEventListener("ended", () => stop("The camera was taken away."));
    await video.play();
  } catch (error) {
    return stop(why(error));
  }
  video.hidden = keep.hidden = false;
  start.disabled = false;
  start.textContent = "Stop the camera";
  say("The camera is on. No frame is kept.");
  follow(mine);
});

keep.addEventListener("click", () => {
  Object.assign(canvas, { width: video.videoWidth, height: video.videoHeight });
  context.drawImage(video, 0, 0);
  canvas.toBlob(async (blob) => {
    try {
      const { path } = await upload(new File([blob], "camera.png", { type: "image/png" }));
      props.value = JSON.stringify([{ path, orig_name: "camera.png" }]);
      trigger("taken");
      stop("The camera is off; the picture that you kept stands above.");
      document.querySelector("#picture").scrollIntoView({ block: "center" });
    } catch (error) {
      say("The picture could not be kept; try it again.");
    }
  }, "image/png");
});
