// A rating desk: pictures one after the other, a button and a digit key for each choice.
// `desk` draws it. In a notebook (the default export) Python keeps the answers; in a web page `page` does.
// No template literals: the crowd platform replaces every dollar sign with braces behind it.

function node(kind, name, text) {
  const made = document.createElement(kind);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}

function button(text, key) {
  const made = node("button", "", key ? undefined : text);
  made.type = "button";
  if (key) made.append(node("kbd", "", key), text);
  return made;
}

function desk(root, question, choices, names, on) {
  let state = null, waiting = false;
  root.classList.add("rating");
  root.tabIndex = 0;
  root.dataset.lmSuppressShortcuts = "true"; // digits are JupyterLab's heading levels
  const asked = node("p", "rating-question", question), pictures = node("div", "rating-pictures"), buttons = node("div", "rating-choices"), foot = node("div", "rating-foot");
  const bar = node("progress"), count = node("span", "rating-count"), note = node("p", "rating-note");
  const back = button("\u2190 back"), next = button("next \u2192");
  buttons.classList.toggle("two", choices.length === 2);
  note.setAttribute("role", "status");
  foot.append(back, bar, count, next);
  root.replaceChildren(asked, pictures, buttons, foot, note);

  const open = () => state && !waiting && !state.locked;
  function choose(answer) {
    if (!open() || state.position >= state.total || pictures.querySelector(".missing")) return;
    waiting = true;
    on.answer(state.position, answer);
  }
  function go(step) {
    const to = open() ? state.position + step : -1;
    if (to < 0 || to > state.total || (step > 0 && state.answer < 0)) return;
    waiting = true;
    on.go(state.position, to);
  }
  const choice = choices.map((name, i) => {
    const made = button(name, String(i + 1));
    made.addEventListener("click", () => { choose(i); root.focus({ preventScroll: true }); });
    buttons.append(made);
    return made;
  });
  back.addEventListener("click", () => go(-1));
  next.addEventListener("click", () => go(1));
  root.addEventListener("keydown", event => {
    if (event.ctrlKey || event.altKey || event.metaKey || event.repeat || event.target.tagName === "INPUT") return;
    const number = choices.findIndex((_, i) => event.key === String(i + 1));
    if (number >= 0) choose(number);
    else if (event.key === "ArrowLeft") go(-1);
    else if (event.key === "ArrowRight") go(1);
    else return;
    event.preventDefault();
    event.stopPropagation();
  });

  function picture(source, i) {
    const figure = node("figure"), image = node("img");
    image.alt = names[i] || "a face";
    image.addEventListener("error", () => {
      image.classList.add("missing");
      note.textContent = "This picture cannot be loaded. Please reload the page.";
    });
    image.src = source;
    figure.append(image);
    if (names[i]) figure.append(node("figcaption", "", names[i]));
    return figure;
  }

  return function show(now) {
    const same = state && JSON.stringify(state.pictures) === JSON.stringify(now.pictures);
    state = now;
    waiting = false;
    const done = state.position >= state.total;
    note.textContent = state.note || "";
    if (!same) pictures.replaceChildren(...(state.pictures || []).map(picture));
    pictures.classList.toggle("several", (state.pictures || []).length > 1);
    asked.hidden = pictures.hidden = buttons.hidden = done;
    choice.forEach((b, i) => { b.classList.toggle("chosen", i === state.answer); b.setAttribute("aria-pressed", String(i === state.answer)); });
    back.hidden = state.position === 0;
    next.hidden = done || state.answer < 0;
    bar.max = state.total;
    bar.value = state.answered;
    count.textContent = done ? "all " + state.total + " answered" : state.position + 1 + " of " + state.total;
  };
}

// A page of its own. On the crowd platform it submits a form; elsewhere it asks for a code and hands out a results file.
function page(root, study) {
  const query = new URLSearchParams(location.search), assignment = query.get("assignmentId");
  const platform = assignment !== null, preview = assignment === "ASSIGNMENT_ID_NOT_AVAILABLE";
  let worker = platform ? query.get("workerId") || "" : "", sitting = { answers: [], seconds: 0 }, place = 0, since = Date.now();
  const total = study.items.length, store = () => "emoca-study/" + study.task + "/" + worker;

  function load() {
    try {
      const kept = JSON.parse(localStorage.getItem(store()) || "{}");
      const sound = Array.isArray(kept.answers) && kept.answers.length <= total
        && kept.answers.every(a => Number.isInteger(a) && a >= 0 && a < study.choices.length);
      if (sound) sitting = { answers: kept.answers, seconds: Number(kept.seconds) || 0 };
    } catch { } // a page in a sandbox keeps nothing
    place = sitting.answers.length;
  }
  function save() {
    const now = Date.now();
    sitting.seconds += Math.min(60, (now - since) / 1000); // a pause is not work
    since = now;
    try { localStorage.setItem(store(), JSON.stringify(sitting)); } catch { }
  }

  const draw = desk(root, study.question, study.choices, study.names, {
    answer(position, answer) { sitting.answers[position] = answer; save(); place = position + 1; refresh(); },
    go(_, to) { place = to; refresh(); },
  });
  const end = node("p", "rating-end"), finish = button(platform ? "Submit" : "Save the results");
  end.append(finish);
  root.append(end);

  function refresh() {
    const done = place >= total, answer = done ? -1 : sitting.answers[place] ?? -1;
    draw({ pictures: done ? [] : study.items[place], position: place, total, answer, answered: sitting.answers.length, locked: preview,
           note: preview ? "This is a preview. Accept the task to begin." : "" });
    end.hidden = !done;
    if (place + 1 < total) for (const source of study.items[place + 1]) new Image().src = source;
    (done ? finish : root).focus({ preventScroll: true });
  }

  function submit() {
    const form = node("form"), base = query.get("turkSubmitTo") || "https://www.mturk.com";
    form.method = "post";
    form.action = base.replace(/\/$/, "") + "/mturk/externalSubmit";
    const field = (name, value) => { const made = node("input"); made.type = "hidden"; made.name = name; made.value = value; form.append(made); };
    field("assignmentId", assignment);
    sitting.answers.forEach((a, i) => field("answer_" + (i + 1), study.choices[a]));
    document.body.append(form);
    form.submit();
  }
  function hand_out() {
    const cells = { HITId: study.task, AssignmentId: study.task + "-" + worker, WorkerId: worker, WorkTimeInSeconds: Math.round(sitting.seconds), "Input.task": study.task };
    sitting.answers.forEach((a, i) => { cells["Answer.answer_" + (i + 1)] = study.choices[a]; });
    const text = Object.keys(cells).join(",") + "\r\n" + Object.values(cells).join(",") + "\r\n", link = node("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
    link.download = study.task + "-" + worker + ".csv";
    link.click();
  }
  finish.addEventListener("click", platform ? submit : hand_out);

  function begin() { load(); since = Date.now(); welcome.hidden = true; root.hidden = false; refresh(); }
  const welcome = node("div", "rating"), code = node("input"), start = button("Begin"), wrong = node("p", "rating-note");
  study.instructions.forEach(text => welcome.append(node("p", "", text)));
  code.placeholder = "your participant code";
  code.setAttribute("aria-label", "participant code");
  code.hidden = platform;
  start.addEventListener("click", () => {
    if (!platform) worker = code.value.trim();
    if (platform || /^[A-Za-z0-9_-]{1,40}$/.test(worker)) begin();
    else wrong.textContent = "A code is made of letters, digits, - and _.";
  });
  code.addEventListener("keydown", event => { if (event.key === "Enter") start.click(); });
  welcome.append(code, " ", start, wrong);
  root.hidden = true;
  root.before(welcome);
}

export { page };

export default {
  render({ model, el }) {
    const root = node("div");
    el.append(root);
    const show = desk(root, model.get("question"), model.get("choices"), model.get("names"), {
      answer(position, answer) { model.send({ position, answer }); },
      go(position, to) { model.send({ position, to }); },
    });
    const update = () => show(model.get("state"));
    model.on("change:state", update);
    update();
    return () => model.off("change:state", update);
  },
};
