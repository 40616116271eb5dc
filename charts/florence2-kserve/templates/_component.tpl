{{/* One component of the InferenceService. Takes root and part. */}}

{{- define "florence2.component" -}}
{{- $root := .root -}}
{{- $values := index .root.Values .part -}}
{{- $knative := include "florence2.knative" .root -}}
{{- $gpu := and (eq .part "predictor") $values.gpu.enabled -}}
{{ include "florence2.scaling" . }}
timeout: {{ $values.timeoutSeconds }}
{{- if $knative }}
containerConcurrency: {{ $values.containerConcurrency }}
{{- else }}
deploymentStrategy:
  {{- $strategy := $values.deploymentStrategy }}
  {{- toYaml (ternary $strategy (omit $strategy "rollingUpdate") (eq $strategy.type "RollingUpdate")) | nindent 2 }}
{{- end }}
{{- with include "florence2.componentLabels" . | fromYaml }}
labels:
  {{- toYaml . | nindent 2 }}
{{- end }}
annotations:
  {{- include "florence2.componentAnnotations" . | fromYaml | toYaml | nindent 2 }}
serviceAccountName: {{ include "florence2.serviceAccountName" $root }}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with $root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if not $knative }}
terminationGracePeriodSeconds: {{ include "florence2.terminationGracePeriodSeconds" . }}
{{- end }}
{{- if include "florence2.podSecurity" . }}
securityContext:
  {{- toYaml $root.Values.podSecurityContext | nindent 2 }}
{{- end }}
{{- include "florence2.scheduling" . }}
containers:
  - name: kserve-container
    image: {{ include "florence2.image" . | quote }}
    imagePullPolicy: {{ $values.image.pullPolicy }}
    args:
      {{- include "florence2.args" . | nindent 6 }}
    env:
      {{- include "florence2.env" . | trim | nindent 6 }}
    {{- with $values.extraEnvFrom }}
    envFrom:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    ports:
      {{- include "florence2.ports" . | nindent 6 }}
    resources:
      {{- include "florence2.resources" . | nindent 6 }}
    {{- include "florence2.probes" . | nindent 4 }}
    {{- if and (not $knative) $root.Values.standard.preStopSeconds }}
    lifecycle:
      preStop:
        sleep:
          seconds: {{ $root.Values.standard.preStopSeconds }}
    {{- end }}
    securityContext:
      {{- toYaml $root.Values.securityContext | nindent 6 }}
    volumeMounts:
      - name: tmp
        mountPath: /tmp
      - name: cache
        mountPath: /cache
      {{- with $values.extraVolumeMounts }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
volumes:
  - name: tmp
    emptyDir:
      sizeLimit: {{ $values.tmpSizeLimit }}
  - name: cache
    {{- if $values.cache.existingClaim }}
    persistentVolumeClaim:
      claimName: {{ $values.cache.existingClaim }}
    {{- else }}
    emptyDir:
      sizeLimit: {{ $values.cache.sizeLimit }}
    {{- end }}
  {{- with $values.extraVolumes }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{/* Whether the pod's own security context is set: a claim belongs to root unless its fsGroup says otherwise. */}}
{{- define "florence2.podSecurity" -}}
{{- if or (not (include "florence2.knative" .root)) .root.Values.knative.podSecurityContext (index .root.Values .part).cache.existingClaim -}}
yes
{{- end -}}
{{- end -}}

{{- define "florence2.componentLabels" -}}
{{- $values := index .root.Values .part -}}
{{- $labels := merge dict $values.podLabels .root.Values.podLabels -}}
{{- if and (eq .part "predictor") (include "florence2.knative" .root) .root.Values.knative.predictorClusterLocal -}}
{{- $_ := set $labels "networking.knative.dev/visibility" "cluster-local" -}}
{{- end -}}
{{- toYaml $labels -}}
{{- end -}}

{{- define "florence2.componentAnnotations" -}}
{{- $values := index .root.Values .part -}}
{{- include "florence2.scalingAnnotations" . }}
{{- if include "florence2.knative" .root }}
serving.knative.dev/progress-deadline: {{ max 600 (add $values.probes.startupSeconds 300) }}s
{{- with .root.Values.knative.rolloutDuration }}
serving.knative.dev/rollout-duration: {{ . }}
{{- end }}
{{- end }}
{{- with merge dict $values.podAnnotations .root.Values.podAnnotations }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Arguments: what KServe would otherwise fill in by its own lights. It takes a flag for given if one begins with it. */}}
{{- define "florence2.args" -}}
- {{ .part }}
- --model_name={{ .root.Values.modelName }}
- --workers=1 # KServe would start one for each of containerConcurrency; one process serves, replicas scale
{{- if and (eq .part "transformer") (not (include "florence2.knative" .root)) }}
- --predictor_host={{ include "florence2.headlessName" .root }}:8081
{{- end }}
{{- with (index .root.Values .part).extraArgs }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "florence2.resources" -}}
{{- $values := index .root.Values .part -}}
{{- $resources := deepCopy $values.resources -}}
{{- if and (eq .part "predictor") $values.gpu.enabled -}}
{{- range list "requests" "limits" -}}
{{- $_ := set $resources . (merge (dict $values.gpu.resourceName $values.gpu.count) (index $resources . | default dict)) -}}
{{- end -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{/* Where a component's pods may run. */}}
{{- define "florence2.scheduling" -}}
{{- $values := index .root.Values .part -}}
{{- $nodeSelector := $values.nodeSelector -}}
{{- $tolerations := $values.tolerations -}}
{{- $runtimeClass := "" -}}
{{- if and (eq .part "predictor") $values.gpu.enabled -}}
{{- $nodeSelector = merge dict $values.gpu.nodeSelector $nodeSelector -}}
{{- $tolerations = concat $tolerations $values.gpu.tolerations -}}
{{- $runtimeClass = $values.gpu.runtimeClassName -}}
{{- end -}}
{{- with $runtimeClass }}
runtimeClassName: {{ . }}
{{- end }}
{{- with $values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with $nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.topologySpreadConstraints }}
topologySpreadConstraints:
  {{- range . }}
  - {{ merge dict . (dict "labelSelector" (dict "matchLabels" (include "florence2.podSelector" $ | fromYaml))) | toYaml | nindent 4 | trim }}
  {{- end }}
{{- end }}
{{- end -}}
